"""Generation with sharded weights (stage 3): a layer is whole on a rank while it runs, and no longer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from eagle_train import dist
from eagle_train.model.generate import Access
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.zero.join import import_deepspeed


@contextmanager
def served_by_layer(model: VisionLanguageModel) -> Iterator[Access]:
    """Makes each layer of a model's LLM gather its weights when it is called, and let go of them after it.

    Ranks gather together, so they must call the layers equally often, see `Access`. What comes before the LLM has no
    common order of calls, see `generate`: it is whole for the time of a batch's prompts.
    """
    gathering = Gathering()
    with ExitStack() as stack:
        for unit in units_of(model.llm):
            stack.callback(unit.register_forward_pre_hook(gathering.begin).remove)
            stack.callback(unit.register_forward_hook(gathering.end).remove)
        yield Access(gathering.whole, together=dist.world_size() > 1)


def units_of(llm: nn.Module) -> list[nn.Module]:
    """Returns modules that together have all parameters of an LLM, none within another: its layers, and the rest."""
    layers = [layer for layers in llm.modules() if isinstance(layers, nn.ModuleList) for layer in layers]
    inside = {id(module) for layer in layers for module in layer.modules()}
    outermost = [layer for layer in layers if not any(layer in other.modules() for other in layers if other != layer)]
    rest = [m for m in llm.modules() if id(m) not in inside and next(m.parameters(recurse=False), None) is not None]
    return [*outermost, *rest]


class Gathering:
    """Gathers the weights of modules; those that are whole already stay so until who gathered them lets go."""

    def __init__(self) -> None:
        self.whole_now: set[nn.Parameter] = set()
        self.running: dict[nn.Module, ExitStack] = {}

    @contextmanager
    def whole(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Keeps all weights of modules whole on this rank; all ranks enter and leave it together."""
        parameters = {parameter for module in modules for parameter in module.parameters()} - self.whole_now
        ordered = sorted(parameters, key=lambda parameter: parameter.ds_id)  # the same on all ranks
        with import_deepspeed().zero.GatheredParameters(ordered, enabled=bool(ordered)):
            self.whole_now |= parameters
            yield
            self.whole_now -= parameters

    def begin(self, module: nn.Module, inputs: tuple) -> None:
        """Gathers a module's weights when it is called, as a hook of it."""
        del inputs
        stack = self.running[module] = ExitStack()
        stack.enter_context(self.whole([module]))

    def end(self, module: nn.Module, inputs: tuple, outputs: object) -> None:
        """Lets go of them, as a hook of it."""
        del inputs, outputs
        self.running.pop(module).close()
