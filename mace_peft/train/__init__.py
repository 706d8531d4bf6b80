"""``--peft`` in ``mace_run_train``: nothing outside this folder knows that command."""
