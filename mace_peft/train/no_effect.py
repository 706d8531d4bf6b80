"""Options of MACE that are given, and on which a run does not act: the log says so before the training."""

import argparse
import logging

from mace.tools import build_default_arg_parser

from mace_peft.train.data.heads import OF_MP, replays, replays_own_file

OF_STAGE_TWO = ("start_swa", "swa_lr", "swa_energy_weight", "swa_forces_weight", "swa_stress_weight",
                "swa_virials_weight", "swa_dipole_weight", "swa_polarizability_weight")
OF_SCHEDULES = ("scheduler", "lr_factor", "scheduler_patience", "lr_scheduler_gamma")
OF_REPLAY = ("num_samples_pt", "subselect_pt", "filter_type_pt", "disallow_random_padding_pt", "weight_pt_head",
             "force_mh_ft_lr", "real_pt_data_ratio_threshold", "pseudolabel_replay_compute_stress")
OF_NEW_MODELS = (
    "r_max", "radial_type", "num_radial_basis", "num_cutoff_basis", "pair_repulsion", "distance_transform",
    "apply_cutoff", "use_last_readout_only", "use_embedding_readout", "interaction", "interaction_first", "max_ell",
    "correlation", "use_reduced_cg", "use_so3", "use_agnostic_product", "num_interactions", "MLP_irreps", "radial_MLP",
    "hidden_irreps", "edge_irreps", "use_edge_irreps_first", "num_channels", "max_L", "gate", "embedding_specs",
    "kspace_cutoff_factor", "atomic_multipoles_max_l", "atomic_multipoles_smearing_width", "field_feature_max_l",
    "field_feature_widths", "field_feature_norms", "num_recursion_steps", "field_si",
    "include_electrostatic_self_interaction", "add_local_electron_energy", "quadrupole_feature_corrections",
    "return_electrostatic_potentials", "field_norm_factor", "fixedpoint_update_config", "field_readout_config",
    "scaling", "mean", "std", "avg_num_neighbors", "compute_avg_num_neighbors")
# options, when they have no effect, and what the log says of why; the first row that fits an option counts
ROWS = (
    (OF_STAGE_TWO, lambda args: not args.swa, "without --swa"),
    (("ema_decay",), lambda args: not args.ema, "without --ema"),
    (("huber_delta",), lambda args: args.loss not in ("huber", "universal"), "with --loss {loss}"),
    (("lr", "swa_lr", "lr_params_factors", "optimizer", "beta", "weight_decay", *OF_SCHEDULES),
     lambda args: args.lbfgs, "with --lbfgs, which chooses its steps itself"),
    (("beta1_schedulefree", "beta2_schedulefree"), lambda args: args.optimizer != "schedulefree",
     "with --optimizer {optimizer}"),
    (("beta", *OF_SCHEDULES), lambda args: args.optimizer == "schedulefree",
     "with --optimizer schedulefree"),
    (("lr_factor", "scheduler_patience"), lambda args: args.scheduler != "ReduceLROnPlateau",
     "with --scheduler {scheduler}"),
    (("lr_scheduler_gamma",), lambda args: args.scheduler != "ExponentialLR", "with --scheduler {scheduler}"),
    (("num_samples_pt", "subselect_pt", "filter_type_pt", "allow_random_padding_pt"), replays_own_file,
     "on --pt_train_file {pt_train_file}, of which MACE takes all structures"),
    (("loss",), lambda args: replays(args) and args.loss != "universal", "with replay, which MACE trains by universal"),
    (("lr_params_factors",), lambda args: args.swa, "in stage two, where every parameter has --swa_lr"),
    (OF_NEW_MODELS, lambda args: True, "on a foundation model, which has its own"),
    (OF_REPLAY, lambda args: not replays(args), "without replay"),
    (("valid_fraction",), lambda args: args.valid_file is not None, "beside --valid_file"),
    (("lora_rank", "lora_alpha"), lambda args: True, "without --lora, whose place --peft takes"),
    (("compute_stress", "compute_polarizability", "compute_atomic_dipole"), lambda args: True,
     "on a run, whose loss decides what is computed"),
    (("wandb_dir", "wandb_project", "wandb_entity", "wandb_name", "wandb_log_hypers"), lambda args: not args.wandb,
     "without --wandb"),
)


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    """Options that have no effect on the run, by name, and why."""
    rows = {}
    for names, applies, why in ROWS:
        for name in names if applies(args) else ():
            rows.setdefault(name, why.format(**vars(args)))
    return rows


def warn_of_no_effect(args: argparse.Namespace) -> None:
    """Log each option that is not at its default, and has no effect on the run; and that nothing is replayed."""
    if args.multiheads_finetuning and not replays(args):
        logging.info("No data are replayed: --multiheads_finetuning acts with --pt_train_file, and on the foundation "
                     f"models {', '.join(OF_MP)}")
    default = build_default_arg_parser().get_default
    for name, why in without_effect(args).items():
        value = getattr(args, name, None)  # releases differ in their options
        if value is not None and value != default(name):
            logging.warning(f"--{name} {value} has no effect {why}")
