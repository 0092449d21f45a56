# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The game: images and student evolve against each other, under the teacher."""
from .discrepancy import discrepancy
from .evolver import Evolver
from .game import check_evolution, evolve, evolver
from .learner import StudentLearner

__all__ = ['Evolver', 'StudentLearner', 'check_evolution', 'discrepancy', 'evolve', 'evolver']
