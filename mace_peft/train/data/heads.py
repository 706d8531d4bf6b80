"""The heads of a run: what ``--heads`` says of them."""

import argparse
import ast

from mace_peft.errors import PeftError, did_you_mean

PT_HEAD = "pt_head"  # MACE's name for the head of replay
REPLAY_SETS = ("mp", "matpes_pbe", "matpes_r2scan", "omat")  # names of sets that MACE downloads
OF_MP = ("small", "medium", "large")  # names of foundations for which it replays mp, whatever is asked for
# what MACE reads of a head, beside names of keys
ENTRIES = ("train_file", "valid_file", "test_file", "test_dir", "E0s", "statistics_file", "valid_fraction",
           "config_type_weights", "keep_isolated_atoms", "atomic_numbers", "mean", "std", "avg_num_neighbors",
           "compute_avg_num_neighbors", "info_keys", "arrays_keys")
EXAMPLE = "such as {'dft': {'train_file': 'dft.xyz', 'E0s': 'foundation'}}"


def read_heads(args: argparse.Namespace) -> dict[str, dict]:
    """The heads that ``--heads`` names, or MACE's one without it. Raises PeftError for what it would not read."""
    if args.heads is None:
        return {"Default": {}}
    try:
        heads = ast.literal_eval(args.heads) if isinstance(args.heads, str) else args.heads
    except (ValueError, SyntaxError, TypeError):
        heads = None
    if not isinstance(heads, dict) or not heads or not all(isinstance(head, dict) for head in heads.values()):
        raise PeftError(f"--heads {args.heads} is no dictionary of heads: give one {EXAMPLE}")
    keys = [name for name in vars(args) if name.endswith("_key")]
    for name, head in heads.items():
        for entry in head:
            if entry not in (*ENTRIES, *keys):
                raise PeftError(f"--heads has {entry!r} for the head {name}, which MACE does not read"
                                f"{did_you_mean(str(entry), (*ENTRIES, *keys))}: leave it out, or use one of "
                                f"{', '.join((*ENTRIES, *keys))}")
        given = [entry for entry in head if entry not in ("info_keys", "arrays_keys", *keys)]
        if name == PT_HEAD and replays(args) and given:
            raise PeftError(f"--heads has {given[0]!r} for {PT_HEAD}, of which MACE takes the keys alone: give its "
                            "files by --pt_train_file and --pt_valid_file")
    check_files_of(heads, args)
    return heads


def check_files_of(heads: dict[str, dict], args: argparse.Namespace) -> None:
    """Raise PeftError for test sets that MACE would not read, or not for each head that has them."""
    own = [head for name, head in heads.items() if name != PT_HEAD]
    for option in ("test_file", "test_dir"):
        if getattr(args, option) is not None:
            raise PeftError(f"--{option} {getattr(args, option)} is not read with --heads: give {option!r} in the "
                            f"heads, {EXAMPLE}")
        if len(own) > 1 and own[0].get(option) and all(head.get(option) == own[0][option] for head in own):
            raise PeftError(f"--heads has the {option} {own[0][option]} for each head, and MACE would evaluate the "
                            "first head alone on it: give each its own, such as a copy")


def replays(args: argparse.Namespace) -> bool:
    """Whether MACE trains a head of replay as well."""
    return bool(args.multiheads_finetuning) and (args.pt_train_file is not None or args.foundation_model in OF_MP)


def replays_own_file(args: argparse.Namespace) -> bool:
    return replays(args) and args.pt_train_file is not None and args.pt_train_file not in REPLAY_SETS
