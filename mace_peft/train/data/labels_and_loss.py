"""Whether a run's labels and its loss go together: what would train nothing, or be ignored, is said."""

import argparse
import logging

from mace.tools import build_default_arg_parser

from mace_peft.errors import PeftError
from mace_peft.train.data.heads import PT_HEAD
from mace_peft.train.data.labels import DEFAULT_KEYS, LABELS, keys_of, read

# losses that take more than energies and forces, or less
BOTH = ("energy", "forces")
TAKEN = {"forces_only": ("forces",), "virials": (*BOTH, "virials"), "energy_forces_dipole": (*BOTH, "dipole"),
         **dict.fromkeys(("stress", "huber", "universal"), (*BOTH, "stress"))}
NAMES = {"train": "training", "valid": "validation"}


def check_labels(args: argparse.Namespace, heads: list, counts: dict[tuple[str, str], dict[str, int]]) -> None:
    """Raise PeftError for a set without a label for the loss, or a key that no structure has; log what is left out.

    heads: MACE's configurations. counts: how many structures have each label, by head and part ("train" or "valid").
    """
    taken = TAKEN.get(args.loss, BOTH)
    for (head, part), held in counts.items():
        if not any(held[name] for name in taken):
            raise PeftError(f"the {NAMES[part]} set of the head {head} has no label for --loss {args.loss}, which "
                            f"takes {', '.join(taken)}: give their keys by --energy_key, --forces_key and so on, or "
                            "another --loss")
    trained = {name: sum(held[name] for (_, part), held in counts.items() if part == "train") for name in LABELS}
    for name in LABELS:
        asked = asked_keys(name, heads)
        if asked and not trained[name]:
            raise PeftError(f"--{name}_key {asked[0]}: no structure of the training set has a label under it; the keys "
                            f"of {heads[0].train_file[0]} are {', '.join(keys_in(heads[0].train_file[0]))}: give one "
                            "of them, or leave it out")
        if name in taken and not trained[name]:
            key = heads[0].key_specification
            key = {**key.info_keys, **key.arrays_keys}.get(name, DEFAULT_KEYS.get(name))
            logging.warning(f"No structure of the training set has {name} under the key {key} (--{name}_key), so that "
                            f"--loss {args.loss} trains on the other labels alone")
        if name not in taken and asked and trained[name]:
            logging.warning(f"--loss {args.loss} leaves out the {trained[name]} labels of {name} (--{name}_key "
                            f"{asked[0]})")
    for head in heads:
        keys = [] if head.collections is not None else keys_of_head(head, LABELS)
        if keys:
            logging.warning(f"The keys {', '.join(keys)} do not act on the head {head.head_name}: HDF5 files have "
                            "those that they were made with, and LMDB files MACE's own")
    for name in ignored_weights(args, taken):
        logging.warning(f"--{name} {getattr(args, name)} has no effect with --loss {args.loss}, which weighs "
                        f"{' and '.join(taken)}{' by 1 each' if args.loss == 'ef' else ''}: --loss weighted, stress or "
                        "virials take weights")
    if args.swa and "stress" in taken and args.loss == "huber":
        logging.warning("Stage two of --loss huber is that of --loss weighted in MACE, and leaves the stress out")


def ignored_weights(args: argparse.Namespace, taken: tuple[str, ...]) -> list[str]:
    """The weights of losses that are given, and of which the chosen loss takes no notice in stage one."""
    default = build_default_arg_parser().get_default
    given = [name for name in LABELS if getattr(args, f"{name}_weight", None) != default(f"{name}_weight")]
    return [f"{name}_weight" for name in given if args.loss == "ef" or name not in taken]


def asked_keys(name: str, heads: list) -> list[str]:
    """Keys of the label that are not MACE's own ones, in heads that are read from XYZ files."""
    return [key for head in heads if head.collections is not None for key in keys_of_head(head, (name,))]


def keys_of_head(head, names: tuple[str, ...]) -> list[str]:
    """The keys of these labels that are not MACE's own ones; none for replay, which has MACE's data."""
    keys = {**head.key_specification.info_keys, **head.key_specification.arrays_keys}
    return [keys[name] for name in names if name in keys and keys[name] != DEFAULT_KEYS.get(name)
            and head.head_name != PT_HEAD]


def keys_in(path: str) -> list[str]:
    return keys_of(read(path))
