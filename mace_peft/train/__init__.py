"""``--peft`` in ``mace_run_train``: nothing outside this folder and ``data/`` knows that command."""
