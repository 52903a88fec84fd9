"""Files that come along: the built-in model, configurations of published models, protocols, recipes, prompts."""

from pathlib import Path

ASSETS = Path(__file__).parent
