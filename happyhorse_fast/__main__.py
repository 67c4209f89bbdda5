"""``python -m happyhorse_fast``: the command line where the program ``happyhorse-fast`` is not installed."""

from happyhorse_fast.cli import main

if __name__ == "__main__":
    main()
