"""`python -m ferroflash.bench`: ferroflash beside every other implementation of attention that is installed."""
