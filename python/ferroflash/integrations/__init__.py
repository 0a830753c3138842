"""ferroflash in other libraries. Each module has `register()`; importing one changes nothing."""
