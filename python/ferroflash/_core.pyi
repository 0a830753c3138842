from typing import List, Optional, Tuple

import torch

_Inputs = Tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    Optional[torch.Tensor],
    Optional[torch.Tensor],
    Optional[torch.Tensor],
    Optional[torch.Tensor],
    Optional[torch.Tensor],
    Optional[torch.Tensor],
]
_Options = Tuple[
    Optional[int],
    Optional[int],
    Optional[float],
    bool,
    Optional[int],
    Optional[int],
    Optional[float],
    float,
    Tuple[int, int],
    bool,
    bool,
]
_Place = Optional[Tuple[int, int]]

class _Allocate:
    def __call__(self, size: int) -> torch.Tensor: ...

__version__: str

def attention(
    tensors: _Inputs,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    options: _Options,
    place: _Place,
    allocate: _Allocate,
) -> None: ...
def attention_backward(
    tensors: _Inputs,
    results: Tuple[torch.Tensor, torch.Tensor, torch.Tensor, Optional[torch.Tensor]],
    gradients: Tuple[torch.Tensor, torch.Tensor, torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]],
    options: _Options,
    place: _Place,
    allocate: _Allocate,
) -> None: ...
def softmax(x: torch.Tensor, y: torch.Tensor, method: str, place: _Place) -> None: ...
def devices() -> List[Tuple[str, Tuple[int, int], int]]: ...
