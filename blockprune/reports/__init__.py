"""What runs say, as text, tables, figures and a page. Needs no torch."""
