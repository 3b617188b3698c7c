"""The configuration of a PERFT adapter: which of the four variants, how large, and by which rules it combines.

In: what a user writes (`PerftConfig(variant="R", r=8, num_experts=4, top_k=2)`) or what `adapter_config.json` holds.
Out: a checked `PeftConfig`; every combination that has no meaning is refused by name. It knows no model: what depends on
one (`norm_topk=None` "as the base does", `base-rank` with `top_k > K`, layers that do not exist) is settled by
`perft.model.PerftModel` when the adapter is attached.

Method: Liu et al., "PERFT: Parameter-Efficient Routed Fine-Tuning for Mixture-of-Expert Models", arXiv 2411.08212.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from perft.errors import PerftError

Variant = Literal["R", "E", "D", "S"]
Unit = Literal["lora", "parallel"]
Combine = Literal["own", "base-rank"]
Init = Literal["zero-up", "official"]

DEFAULT_NUM_EXPERTS = 4
DEFAULT_TOP_K = 2
DEFAULT_ROUTER_AUX_LOSS_COEF = 0.01  # the authors' value for OLMoE; theirs for Mixtral is 0.02


def _peft_type() -> PeftType:
    """PEFT's enum of methods, extended by ours: `register_peft_method` demands a member and PEFT has no public way in."""
    if "PERFT" not in PeftType.__members__:
        member = str.__new__(PeftType, "PERFT")
        member._name_ = "PERFT"
        member._value_ = "PERFT"
        type.__setattr__(PeftType, "PERFT", member)
        # the three private tables that EnumType itself fills in
        PeftType._member_names_.append("PERFT")
        PeftType._member_map_["PERFT"] = member
        PeftType._value2member_map_["PERFT"] = member
    return PeftType["PERFT"]


PERFT = _peft_type()


@dataclass
class PerftConfig(PeftConfig):
    """Configuration of one PERFT adapter.

    Args:
        variant: where the adapter experts of a token come from. `R` (Routed): a router of the adapter's own picks
            `top_k` of `num_experts`. `E` (Embedded): one adapter expert per base expert, the base router's choice and
            weights. `D` (Dense): all `num_experts`, weight 1 each. `S` (Single): D with one adapter expert.
        r: rank, the width of an adapter expert's bottleneck.
        unit: `lora` (no activation, scale `alpha / r`) or `parallel` (SiLU in the bottleneck, scale 1).
        alpha: numerator of the `lora` unit's scale; `None` means `2 * r`, as in all published runs.
        num_experts: M, the number of adapter experts (R: default 4; D: must be given; S: 1; E: the base decides).
        top_k: adapter experts per token (R only, default 2).
        norm_topk: renormalise the adapter router's top-k weights to sum 1 (R only). `None`: as the base does.
        combine: whose weights multiply the chosen adapter experts (R only). `own`: the adapter router's. `base-rank`:
            the base router's top-k weights by rank position, as in the authors' released OLMoE code.
        dropout: dropout rate while training (lora: on the unit's input; parallel: before the activation).
        init: `zero-up` (a fresh adapter is exactly the identity) or `official` (up ~ N(0, 1e-12), as in the paper).
        router_aux_loss_coef: weight of the adapter router's load-balancing loss while training (R only; default 0.01).
        layers_to_transform: decoder layers that get the adapter; `None` means every layer that has an MoE block.

    Raises:
        PerftError: a value is out of its range, or a combination has no meaning.
    """

    variant: Variant = field(default="R", metadata={"help": "R (Routed), E (Embedded), D (Dense) or S (Single)."})
    r: int = field(default=8, metadata={"help": "Rank of an adapter expert."})
    unit: Unit = field(default="lora", metadata={"help": "lora (linear, scale alpha/r) or parallel (SiLU, scale 1)."})
    alpha: float | None = field(default=None, metadata={"help": "Scale numerator of the lora unit (default 2*r)."})
    num_experts: int | None = field(default=None, metadata={"help": "M, the number of adapter experts (R and D)."})
    top_k: int | None = field(default=None, metadata={"help": "Adapter experts per token (R)."})
    norm_topk: bool | None = field(
        default=None, metadata={"help": "Renormalise the adapter router's top-k weights (R); none: as the base does."}
    )
    combine: Combine = field(default="own", metadata={"help": "Whose weights combine R's experts: own or base-rank."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout while training (the authors use 0.05)."})
    init: Init = field(default="zero-up", metadata={"help": "zero-up (fresh adapter = identity) or official."})
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of the adapter router's load-balancing loss (R; default 0.01)."}
    )
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Decoder layers to adapt (default: every layer with an MoE block)."}
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Filled in from the model when the adapter is attached; cannot be chosen."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PERFT
        for name, allowed in (("variant", Variant), ("unit", Unit), ("combine", Combine), ("init", Init)):
            _check_choice(name, getattr(self, name), get_args(allowed))
        _check_int("r", self.r, minimum=1)
        self._check_alpha()
        self._check_experts()
        self._check_router()
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise PerftError(f"dropout must be a number in [0, 1), got {self.dropout!r}")
        if self.layers_to_transform is not None:
            self._check_layers()
        if self.target_modules is not None:
            raise PerftError(
                "target_modules cannot be chosen: PERFT wraps the experts module of each MoE block. "
                "Use layers_to_transform to adapt only some layers."
            )

    def _check_alpha(self) -> None:
        if self.unit == "parallel":
            if self.alpha is not None:
                raise PerftError("alpha has no meaning for unit='parallel' (its scale is 1); leave it out")
        elif self.alpha is None:
            self.alpha = 2.0 * self.r
        elif isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < 1e6:
            raise PerftError(f"alpha must be a positive number, got {self.alpha!r}")

    def _check_experts(self) -> None:
        if self.variant == "E":
            if self.num_experts is not None:
                raise PerftError(
                    "num_experts has no meaning for variant='E' (one adapter expert per base expert); leave it out"
                )
            return
        if self.variant == "S":
            if self.num_experts not in (None, 1):
                raise PerftError(f"variant='S' has exactly one adapter expert, got num_experts={self.num_experts!r}")
            self.num_experts = 1
        elif self.variant == "D" and self.num_experts is None:
            raise PerftError("variant='D' needs num_experts")
        elif self.variant == "R" and self.num_experts is None:
            self.num_experts = DEFAULT_NUM_EXPERTS
        _check_int("num_experts", self.num_experts, minimum=1)

    def _check_router(self) -> None:
        if self.variant != "R":
            for name, neutral in (
                ("top_k", None),
                ("norm_topk", None),
                ("combine", "own"),
                ("router_aux_loss_coef", None),
            ):
                if getattr(self, name) != neutral:
                    raise PerftError(
                        f"{name} has no meaning for variant={self.variant!r} (only R has a router of its own); leave it out"
                    )
            return
        assert self.num_experts is not None
        if self.top_k is None:
            self.top_k = min(DEFAULT_TOP_K, self.num_experts)
        _check_int("top_k", self.top_k, minimum=1)
        if self.top_k > self.num_experts:
            raise PerftError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")
        if self.norm_topk is not None and not isinstance(self.norm_topk, bool):
            raise PerftError(f"norm_topk must be true, false or none, got {self.norm_topk!r}")
        if self.combine == "base-rank" and self.norm_topk is not None:
            raise PerftError(
                "norm_topk has no meaning with combine='base-rank' (the base router's weights are used as is)"
            )
        if self.router_aux_loss_coef is None:
            self.router_aux_loss_coef = DEFAULT_ROUTER_AUX_LOSS_COEF
        coef = self.router_aux_loss_coef
        if isinstance(coef, bool) or not isinstance(coef, (int, float)) or not 0 <= coef < 1e6:
            raise PerftError(f"router_aux_loss_coef must be a number >= 0, got {coef!r}")

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if not isinstance(layers, (list, tuple, set)) or not layers:
            raise PerftError(f"layers_to_transform must be a non-empty list of layer numbers, got {layers!r}")
        for layer in layers:
            _check_int("layers_to_transform", layer, minimum=0)
        self.layers_to_transform = sorted(set(layers))

    @property
    def scale(self) -> float:
        """The factor on a unit's output: `alpha / r` for `lora`, 1 for `parallel`."""
        return 1.0 if self.alpha is None else self.alpha / self.r

    def experts_per_token(self, num_experts: int, base_top_k: int | None) -> int | None:
        """How many adapter experts a token takes: k for R, M for D and S, the base's K for E.

        Args:
            num_experts: M.
            base_top_k: K, if it is known; E needs it.
        """
        if self.variant == "E":
            return base_top_k
        return self.top_k if self.variant == "R" else num_experts

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, without `target_modules`: it is derived from the model each time, never read from a file."""
        fields: dict[str, Any] = super().to_dict()
        fields.pop("target_modules", None)
        return fields


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise PerftError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_int(name: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise PerftError(f"{name} must be an integer >= {minimum}, got {value!r}")
