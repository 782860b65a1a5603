"""The command ``spmd-infer``."""


def main() -> None:
    """Run the command line."""
    from spmd_infer.cli.app import run

    run()
