"""What a process has done that others are forked from: a model has been built and copied, see ``remembered_graphs``."""

import copy
import os

from forks import PLAIN
from remembered_graphs import remember_graphs
from tiny import tiny_mace

if PLAIN not in os.environ:
    remember_graphs()
    copy.deepcopy(tiny_mace())
