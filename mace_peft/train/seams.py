"""The names of MACE and torch that a run with ``--peft`` binds to others, in one table.

They are bound in this order while the run lasts, each once: what has two reasons to change is composed by hand. Beside
them ``plugin.install`` wraps two names of ``mace.cli.run_train`` for good, ``run`` and the parser.
"""

import contextlib
import operator
import pkgutil
import types
from collections.abc import Iterator
from typing import NamedTuple

from mace_peft.files import NO_ROOM, one_line_errors
from mace_peft.patching import replaced


class Seam(NamedTuple):
    """A name that is bound to another value.

    owner: its module or class; ``run_train`` is the module of the command, which may run as ``__main__``.
    stand_in: the attribute of ``FineTune`` that takes its place.
    since: the first release of mace-torch that has the name.
    fast: whether it only saves time, which ``--peft_fast False`` does without.
    """

    owner: str
    name: str
    stand_in: str
    since: str = "0.3.13"
    fast: bool = False

    def find_owner(self, run_train: types.ModuleType) -> object:
        """The module or class that has the name; in the releases that have it."""
        if self.owner.split(".")[0] == "run_train":
            return operator.attrgetter(self.owner)(types.SimpleNamespace(run_train=run_train))
        return pkgutil.resolve_name(self.owner)


SEAMS = (
    Seam("torch", "save", "save_file"),
    Seam("torch.jit", "save", "results.save_compiled"),
    Seam("run_train", "remove_pt_head", "remove_pt_head"),
    Seam("run_train", "configure_model", "configure_model"),
    Seam("run_train", "run_e3nn_to_cueq", "run_e3nn_to_cueq"),
    Seam("run_train", "run_cueq_to_e3nn", "run_cueq_to_e3nn"),
    Seam("run_train", "get_params_options", "get_params_options"),
    Seam("run_train", "get_loss_fn", "get_loss_fn"),
    Seam("run_train", "ExponentialMovingAverage", "ExponentialMovingAverage"),
    Seam("run_train", "LBFGS", "LBFGS"),
    Seam("run_train", "DDP", "DDP"),
    Seam("run_train", "deepcopy", "deepcopy"),
    Seam("run_train", "jit", "jit"),
    Seam("run_train", "create_error_table", "results.create_error_table"),
    Seam("run_train", "TrainingPlotter", "results.TrainingPlotter"),
    Seam("run_train", "apply_pseudolabels_to_pt_head_configs", "apply_pseudolabels", since="0.3.14"),
    Seam("run_train.tools", "CheckpointHandler", "CheckpointHandler"),
    Seam("run_train.tools", "train", "train"),
    Seam("run_train.torch_geometric.dataloader", "DataLoader", "DataLoader"),
    Seam("run_train.data", "estimate_e0s_from_foundation", "estimate_e0s", since="0.3.15"),
    Seam("run_train", "dict_head_to_dataclass", "reading.dict_head_to_dataclass"),
    Seam("run_train", "get_dataset_from_xyz", "reading.get_dataset_from_xyz"),
    Seam("run_train", "load_dataset_for_path", "reading.load_dataset_for_path"),
    Seam("run_train", "get_atomic_energies", "reading.get_atomic_energies"),
    Seam("run_train", "dict_to_array", "reading.dict_to_array"),
    Seam("mace.data", "load_from_xyz", "labels.load_from_xyz"),
    Seam("mace.tools.scripts_utils", "log_dataset_contents", "datasets.log_dataset_contents"),
    Seam("mace.data", "HDF5Dataset", "datasets.HDF5Dataset"),
    Seam("mace.data", "dataset_from_sharded_hdf5", "datasets.dataset_from_sharded_hdf5"),
    Seam("mace.data", "LMDBDataset", "datasets.LMDBDataset"),
    Seam("mace.modules", "WeightedHuberEnergyForcesStressLoss", "losses.WeightedHuberEnergyForcesStressLoss"),
    Seam("mace.modules", "UniversalLoss", "losses.UniversalLoss"),
    Seam("mace.modules", "WeightedEnergyForcesL1L2Loss", "losses.WeightedEnergyForcesL1L2Loss"),
    Seam("mace.modules", "WeightedEnergyForcesDipoleLoss", "losses.WeightedEnergyForcesDipoleLoss"),
    Seam("mace.tools.train", "MACELoss", "metrics.MACELoss"),
    Seam("mace.tools.tables_utils", "evaluate", "results.evaluate_for_table"),
    Seam("mace.tools.train", "train_one_epoch", "finite.train_one_epoch"),
    Seam("mace.tools.train", "take_step", "finite.take_step"),
    Seam("mace.tools.train", "take_step_lbfgs", "finite.take_step_lbfgs"),
    Seam("mace.tools.train", "evaluate", "evaluate"),
    Seam("mace.tools.train", "valid_err_log", "finite.valid_err_log"),
    Seam("mace.cli.visualise_train", "model_inference", "model_inference"),
    Seam("torch.Tensor", "backward", "backward", fast=True),
    Seam("mace.modules.symmetric_contraction.Contraction", "forward", "contract", fast=True),
    Seam("mace.modules.blocks", "scatter_sum", "sum_messages", fast=True),
)


def originals(run_train: types.ModuleType) -> types.SimpleNamespace:
    """What the names are bound to before, by the last part of their stand-in."""
    owners = [(seam, seam.find_owner(run_train)) for seam in SEAMS]
    return types.SimpleNamespace(**{seam.stand_in.rpartition(".")[2]: getattr(owner, seam.name)
                                    for seam, owner in owners if hasattr(owner, seam.name)})


@contextlib.contextmanager
def replaced_names(run_train: types.ModuleType, stand_ins: object, fast: bool) -> Iterator[None]:
    """Bind all names of the table while the block runs."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_line_errors("a file of this run", NO_ROOM))
        for seam in SEAMS:
            owner = seam.find_owner(run_train)
            if hasattr(owner, seam.name) and (fast or not seam.fast):
                stand_in = operator.attrgetter(seam.stand_in)(stand_ins)
                stack.enter_context(replaced(owner, seam.name, stand_in))
        yield
