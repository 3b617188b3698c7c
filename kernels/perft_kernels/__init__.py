"""Operations on tensors for PERFT: knows no model and no request. Importing registers the `perft::` ops with torch."""

from perft_kernels.adapter_router import adapter_router as adapter_router
from perft_kernels.routed_units import routed_units as routed_units
