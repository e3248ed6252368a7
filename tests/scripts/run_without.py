"""Runs a module as ``python -m`` does, with some packages impossible to import.

``python run_without.py PACKAGE,PACKAGE,… MODULE ARGUMENT …``
"""

import runpy
import sys

blocked, *sys.argv = sys.argv[1:]
sys.modules.update(dict.fromkeys(filter(None, blocked.split(","))))
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
