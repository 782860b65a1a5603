"""Exit codes of the command line, as its help lists them."""

UNUSABLE_MODEL = 3
REFUSED_INPUT = 4
NO_LAYOUT = 5
