# What type checkers see of names that are imported on first use.
from mace_peft.adapter.directory import save_adapter as save_adapter
from mace_peft.adapter.load import load_adapter as load_adapter
from mace_peft.config import PeftConfig as PeftConfig
from mace_peft.deploy import calculator as calculator
from mace_peft.errors import PeftError as PeftError
from mace_peft.model.adapted import trainable_parameters as trainable_parameters
from mace_peft.model.inject import eject as eject
from mace_peft.model.inject import inject as inject
from mace_peft.model.inject import merge as merge
from mace_peft.model.ranks import choose_ranks as choose_ranks
from mace_peft.model.ranks import start_along_gradients as start_along_gradients
from mace_peft.model.strength import disable_adapter as disable_adapter
from mace_peft.model.strength import set_strength as set_strength
from mace_peft.model.summary import print_trainable_parameters as print_trainable_parameters

__version__: str
