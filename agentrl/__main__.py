"""Makes `python -m agentrl` work."""

from agentrl.cli import main

if __name__ == "__main__":
    main()
