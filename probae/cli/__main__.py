"""``python -m probae.cli``."""

from probae.cli.program import main

if __name__ == "__main__":
    main()
