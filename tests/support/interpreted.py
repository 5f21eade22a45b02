"""`python tests/support/interpreted.py MODULE …`: `python -m MODULE …` in Triton's interpreter."""

import os
import runpy
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

if __name__ == "__main__":
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.path.insert(0, root)
    from triton_interpreter import fast_interpreter

    sys.argv = sys.argv[1:]
    with fast_interpreter():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
