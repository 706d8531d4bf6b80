"""``python -m mace_peft.run_train``: MACE's training command with the PEFT options.

The same as ``mace_run_train``, for where the start-up hook cannot run: ``python -S``, or packages on ``PYTHONPATH``.
"""


def main() -> None:
    """Runs MACE's training command with the plugin installed."""
    from mace.cli import run_train

    from mace_peft.train import plugin

    plugin.install(run_train)
    run_train.main()


if __name__ == "__main__":
    main()
