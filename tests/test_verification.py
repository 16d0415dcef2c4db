"""The independence probe: passes where documents are independent, and fails in the right row and column."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch

sys.path.insert(0, str(__import__("pathlib").Path(__file__).parent))
