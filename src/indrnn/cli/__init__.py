"""The commands. Their modules import torch and the like inside functions, so that ``--help`` answers at once."""
