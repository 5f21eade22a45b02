"""One side of a regression check: checks and times the package of a tree whenever it is asked.

    python benchmarks/compare/worker.py TREE THREADS

Questions and answers are lines of JSON. Of the package only a public function is used, so that
any commit can be a side.
"""

from __future__ import annotations

import json
import sys
import time

sys.path.pop(0)  # this folder, where the names of files are those of others' modules too
sys.path.insert(0, sys.argv[1])

import torch

import swin_kernels


class Side:
    """Answers questions about the case that was loaded last."""

    def load(self, path: str, result: str) -> dict:
        """Reads a case; writes outputs and gradients of its first inputs, for each gradient of the
        output that is to be checked, to `result`."""
        case = torch.load(path)
        self.options = case["options"]
        self.sets = [
            [None if x is None else x.requires_grad_() for x in leaves] for leaves in case["sets"]
        ]
        self.grads_out = case["grads_out"]
        leaves, found = [x for x in self.sets[0] if x is not None], []
        for grad_out in case["gates"]:
            out = self._attend(self.sets[0])
            found.append((out.detach(), torch.autograd.grad(out, leaves, grad_out)))
        torch.save(found, result)
        return {}

    def _attend(self, leaves: list) -> torch.Tensor:
        qkv, table, logit_scale = leaves
        return swin_kernels.shifted_window_attention_qkvpacked(
            qkv, bias_table=table, logit_scale=logit_scale, **self.options
        )

    def _forward(self) -> None:
        with torch.no_grad():
            self.kept = [self._attend(leaves) for leaves in self.sets]

    def _training(self) -> None:
        self.kept = []
        for leaves, grad_out in zip(self.sets, self.grads_out):
            out = self._attend(leaves)
            wanted = [x for x in leaves if x is not None]
            self.kept.append([out.detach(), *torch.autograd.grad(out, wanted, grad_out)])

    def sample(self, direction: str, passes: int) -> dict:
        """Seconds a call, over so many passes over all inputs."""
        run = self._forward if direction == "forward" else self._training
        run()  # the other side had the caches
        start = time.perf_counter()
        for _ in range(passes):
            run()
        return {"seconds": (time.perf_counter() - start) / (passes * len(self.sets))}


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may speak there
    side = Side()
    print(json.dumps({"package": swin_kernels.__file__}), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = getattr(side, question.pop("do"))(**question)
        except Exception as error:  # that of a case is not that of the others
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
