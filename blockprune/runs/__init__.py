"""Run directories: what was asked, and every record, written and read here."""
