"""``python -m flashdelta``: the program, where its script is not on the path."""

from flashdelta.cli import main

raise SystemExit(main())
