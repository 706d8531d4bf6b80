"""Whether a run's labels and its loss go together: what would train nothing, or be ignored, is said."""

import argparse
import logging

from mace.tools import build_default_arg_parser

from mace_peft.errors import PeftError
from mace_peft.labels import DEFAULT_KEYS, LABELS, keys_of, read
from mace_peft.train.data.heads import PT_HEAD

# losses that take more than energies and forces, or less
BOTH = ("energy", "forces")
TAKEN = {"forces_only": ("forces",), "virials": (*BOTH, "virials"), "energy_forces_dipole": (*BOTH, "dipole"),
         **dict.fromkeys(("stress", "huber", "universal"), (*BOTH, "stress"))}
WEIGHTED_IN_STAGE_TWO = ("huber", "l1l2energyforces", "ef")  # where MACE takes another loss than that of stage one
NAMES = {"train": "training", "valid": "validation"}


def check_labels(args: argparse.Namespace, heads: list, counts: dict[tuple[str, str], dict[str, int]],
                 weighed: dict[tuple[str, str], dict[str, int]]) -> None:
    """Raise PeftError for a set without a label for the loss, or a key that no structure has; log what is left out.

    heads: MACE's configurations. counts: how many structures have each label, by head and part ("train" or "valid");
    weighed: how many have it with a weight.
    """
    taken = TAKEN.get(args.loss, BOTH)
    for (head, part), held in counts.items():
        where = f"the {NAMES[part]} set of the head {head}"
        check_set(args, where, held, held if head == PT_HEAD else weighed[head, part])  # replay may have the weight 0
    for head in heads:
        if head.head_name != PT_HEAD:  # which has MACE's data
            check_head(head, args.loss, counts[head.head_name, "train"], counts[head.head_name, "valid"])
        keys = [] if head.collections is not None else keys_of_head(head, LABELS)
        if keys:
            logging.warning(f"The keys {', '.join(keys)} do not act on the head {head.head_name}: HDF5 files have "
                            "those that they were made with, and LMDB files MACE's own")
    for name in ignored_weights(args, taken):
        logging.warning(f"--{name} {getattr(args, name)} has no effect with --loss {args.loss}, which weighs "
                        f"{' and '.join(taken)}{' by 1 each' if args.loss == 'ef' else ''}: --loss weighted, stress or "
                        "virials take weights")
    if args.swa and args.loss in WEIGHTED_IN_STAGE_TWO:
        left_out = " and leaves the stress out" if "stress" in taken else ""
        logging.warning(f"Stage two of --loss {args.loss} is that of --loss weighted in MACE{left_out}")


def check_set(args: argparse.Namespace, where: str, held: dict[str, int], weighed: dict[str, int]) -> None:
    """Raise PeftError if the set has no label for the loss, or none that has a weight in each stage."""
    taken = TAKEN.get(args.loss, BOTH)
    if not any(held[name] for name in taken):
        raise PeftError(f"{where} has no label for --loss {args.loss}, which takes {', '.join(taken)}: give their keys "
                        "by --energy_key, --forces_key and so on, or another --loss")
    for stage in ("", "swa_") if args.swa else ("",):
        weights = {name: getattr(args, f"{stage}{name}_weight", 1) for name in in_stage(args, stage)}
        if args.loss == "ef" and not stage:
            weights = dict.fromkeys(weights, 1)
        if not any(weighed[name] and weight for name, weight in weights.items()):
            raise PeftError(f"{where} has no label of a weight above 0 for --loss {args.loss}: its structures' weights "
                            f"(config_weight, --config_type_weights) or {given(stage, weights)} are 0: give others")


def given(stage: str, weights: dict[str, float]) -> str:
    return " and ".join(f"--{stage}{name}_weight {weight:g}" for name, weight in weights.items())


def in_stage(args: argparse.Namespace, stage: str) -> tuple[str, ...]:
    """The labels that the loss takes in stage one ("") or two ("swa_")."""
    return BOTH if stage and args.loss in WEIGHTED_IN_STAGE_TWO else TAKEN.get(args.loss, BOTH)


def check_head(head, loss: str, trained: dict[str, int], validated: dict[str, int]) -> None:
    """Raise PeftError for a key of the head that no structure of its training set has; log labels that do not act."""
    taken, where = TAKEN.get(loss, BOTH), f"the training set of the head {head.head_name}"
    keys = {**head.key_specification.info_keys, **head.key_specification.arrays_keys}
    for name in LABELS:
        asked = keys_of_head(head, (name,)) if head.collections is not None else []  # HDF5 files have keys of their own
        key = keys.get(name, DEFAULT_KEYS.get(name))
        if asked and not trained[name]:
            raise PeftError(f"--{name}_key {asked[0]}: no structure of {where} has a label under it; the keys of "
                            f"{head.train_file[0]} are {', '.join(keys_of(read(head.train_file[0])))}: give one of "
                            "them, or leave it out")
        if name in taken and not trained[name]:
            logging.warning(f"No structure of {where} has {name} under the key {key} (--{name}_key), so that --loss "
                            f"{loss} trains on the other labels alone")
        elif name in taken and not validated[name]:
            logging.warning(f"No structure of the validation set of the head {head.head_name} has {name} under the key "
                            f"{key} (--{name}_key), so that the best epoch is chosen by the other labels alone")
        if name not in taken and trained[name]:
            logging.warning(f"--loss {loss} leaves out the {trained[name]} labels of {name} (--{name}_key {key}) in "
                            f"{where}")


def ignored_weights(args: argparse.Namespace, taken: tuple[str, ...]) -> list[str]:
    """The weights of losses that are given, and of which the chosen loss takes no notice."""
    default = build_default_arg_parser().get_default
    ignored = {f"{name}_weight" for name in LABELS if args.loss == "ef" or name not in taken}
    ignored |= {f"swa_{name}_weight" for name in LABELS if args.swa and name not in in_stage(args, "swa_")}
    return [name for name in sorted(ignored) if getattr(args, name, None) not in (None, default(name))]


def keys_of_head(head, names: tuple[str, ...]) -> list[str]:
    """The keys of these labels that are not MACE's own ones; none for replay, which has MACE's data."""
    keys = {**head.key_specification.info_keys, **head.key_specification.arrays_keys}
    return [keys[name] for name in names if name in keys and keys[name] != DEFAULT_KEYS.get(name)
            and head.head_name != PT_HEAD]
