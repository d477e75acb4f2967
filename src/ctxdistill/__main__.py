"""`ctxdistill` and `python -m ctxdistill` are the command line."""

import sys


def main() -> int:
    """Run the command line; returns the exit code. Ctrl-C ends it in good order, too, while it is still imported."""
    try:
        from ctxdistill import cli
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        if "--json" in sys.argv:
            print('{"error": {"kind": "Interrupted", "message": "stopped"}}')
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
