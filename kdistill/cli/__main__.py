"""`python -m kdistill.cli`."""

from kdistill.cli import main

main()
