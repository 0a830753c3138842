from typing import Any, Callable, List, Optional, Tuple

from torch import Tensor

# Q, K, V, bias, mask, slopes, sinks, and where sequences begin.
Inputs = Tuple[
    Tensor,
    Tensor,
    Tensor,
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
]
Outputs = Tuple[Tensor, Tensor]
# dO, dLSE, O and LSE.
Results = Tuple[Optional[Tensor], Optional[Tensor], Tensor, Tensor]
Gradients = Tuple[Tensor, Tensor, Tensor, Optional[Tensor], Optional[Tensor]]

__version__: str

class Options:
    def __new__(
        cls,
        max_seqlen_q: Optional[int],
        max_seqlen_k: Optional[int],
        softmax_scale: Optional[float],
        causal: bool,
        window_left: Optional[int],
        window_right: Optional[int],
        softcap: Optional[float],
        dropout_p: float,
        deterministic: bool,
        allow_tf32: bool,
        num_splits: int,
        *,
        rng_state: Tuple[int, int] = (0, 0),
    ) -> Options: ...
    def numbers(self) -> Tuple[Any, ...]: ...
    def rng_state(self) -> Optional[Tuple[int, int]]: ...

def attend(tensors: Inputs, numbers: Tuple[Any, ...], differentiable: Callable[..., Outputs]) -> Optional[Outputs]: ...
def forward(ctx: Any, options: Options, *tensors: Optional[Tensor]) -> Outputs: ...
def saved(ctx: Any) -> Tuple[Outputs, Inputs]: ...
def backward(
    ctx: Any, dout: Optional[Tensor], dlse: Optional[Tensor], deterministic: bool
) -> Optional[Tuple[Optional[Tensor], ...]]: ...
def attention(tensors: Inputs, options: Options, out: Optional[Tensor] = None) -> Outputs: ...
def attention_backward(
    results: Results,
    tensors: Inputs,
    options: Options,
    deterministic: bool,
    needs_dbias: bool,
    needs_dsinks: bool,
    given: Optional[Tuple[Tensor, Tensor, Tensor]] = None,
) -> Gradients: ...
def softmax(x: Tensor, method: str) -> Tensor: ...
def shortcuts() -> Tuple[bool, bool]: ...
def devices() -> List[Tuple[str, Tuple[int, int], int]]: ...
