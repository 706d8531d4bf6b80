"""Options on which a run does not act are named in its log."""

import logging
import re

import pytest
from combined import write_small
from mace.tools import build_default_arg_parser
from releases import since
from runs import train_here

from mace_peft.train.no_effect import warn_of_no_effect

REPLAY = ["--multiheads_finetuning=True", "--pt_train_file=mine.xyz"]
CASES = {
    "stage two": (["--swa_lr=0.1", "--start_swa=3"],
                  ["--swa_lr 0.1 .* without --swa", "--start_swa 3 .* without --swa"]),
    "with stage two": (["--swa_lr=0.1", "--start_swa=3", "--swa"], []),
    "average": (["--ema_decay=0.5"], ["--ema_decay 0.5 .* without --ema"]),
    "huber": (["--huber_delta=0.5"], ["--huber_delta 0.5 .* with --loss weighted"]),
    "with huber": (["--huber_delta=0.5", "--loss=huber"], []),
    "lbfgs": (["--lbfgs", "--lr=0.5", "--lr_factor=0.5"],
              ["--lr 0.5 .* with --lbfgs", "--lr_factor 0.5 .* with --lbfgs"]),
    "schedule-free": (["--optimizer=schedulefree", "--scheduler=ExponentialLR"],
                      ["--scheduler ExponentialLR .* with --optimizer schedulefree"]),
    "plateau": (["--lr_scheduler_gamma=0.5"], ["--lr_scheduler_gamma 0.5 .* with --scheduler ReduceLROnPlateau"]),
    "exponential": (["--lr_factor=0.5", "--scheduler=ExponentialLR"], ["--lr_factor 0.5 .* with --scheduler Expo"]),
    "replay": ([*REPLAY, "--num_samples_pt=2"], ["--num_samples_pt 2 .* on --pt_train_file mine.xyz"]),
    "loss of replay": ([*REPLAY, "--loss=stress"], ["--loss stress .* with replay"]),
    "no replay": (["--multiheads_finetuning=False", "--num_samples_pt=2"], ["--num_samples_pt 2 .* without replay"]),
    "new models": (["--r_max=6", "--scaling=no_scaling", "--hidden_irreps=8x0e"],
                   ["--r_max 6.0 .* on a foundation", "--scaling no_scaling .* on a", "--hidden_irreps 8x0e .* on a"]),
    "split": (["--valid_fraction=0.2", "--valid_file=valid.xyz"], ["--valid_fraction 0.2 .* beside --valid_file"]),
    "LoRA": (["--lora_rank=8", "--lora_alpha=2"], ["--lora_rank 8 .* without --lora", "--lora_alpha 2.0 .* without"]),
    "defaults": ([], []),
}
if since("0.3.15"):
    CASES["momenta"] = ["--beta1_schedulefree=0.5"], ["--beta1_schedulefree 0.5 .* with --optimizer adam"]


@pytest.mark.parametrize("options, lines", CASES.values(), ids=CASES)
def test_what_has_no_effect_is_named(caplog, options, lines):
    args = build_default_arg_parser().parse_args(["--name=a", "--foundation_model=a.model", *options])
    with caplog.at_level(logging.WARNING):
        warn_of_no_effect(args)
    assert len(caplog.messages) == len(lines)
    for said, line in zip(sorted(caplog.messages), sorted(lines), strict=True):
        assert re.search(line.replace(" .* ", " has no effect .*"), said)


def test_a_run_says_so(tmp_path, uncompiled):
    run = train_here(write_small(tmp_path), peft="elora", peft_rank=1, max_num_epochs=0, ema_decay=0.5)
    assert "WARNING: --ema_decay 0.5 has no effect without --ema" in run.log
