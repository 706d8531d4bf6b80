"""``--peft`` in ``mace_run_train``: what a run does. ``startup`` and ``run_train`` lead here."""
