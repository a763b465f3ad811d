"""Energy and CO2e of the pass that computed a model's features, by the estimate that trainings have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from components.training.config import EnergyConfig
from components.training.cost import CostMeter


@dataclass(frozen=True)
class PassCost:
    """One pass over the images of a set, whenever it was; passes over other sizes or corrupted images do not count.

    Attributes:
        device_seconds: wall-clock time of the pass, summed over its devices.
        energy_kwh: None if the power of the device is not known.
        co2e_kg: the same.
        basis: what the estimate is made of.
    """

    device_seconds: float
    energy_kwh: float | None
    co2e_kg: float | None
    basis: str

    def line(self) -> str:
        """Return the cost as a line."""
        if self.energy_kwh is None or self.co2e_kg is None:
            return f"features took {self.device_seconds:.3g} device seconds, energy not known: {self.basis}"
        return (
            f"features took {self.device_seconds:.3g} device seconds, {self.energy_kwh:.3g} kWh and "
            f"{self.co2e_kg:.3g} kg CO2e, not measured but estimated: {self.basis}"
        )


def pass_cost(device_seconds: float, device: torch.device, config: EnergyConfig) -> PassCost:
    """Estimate the cost of a pass.

    Args:
        device_seconds: as in `PassCost`.
        device: of the kind that it ran on.
        config: of a training on the same machines.
    """
    cost = CostMeter(device, 1, config).so_far(device_seconds)
    if cost["energy_kwh"] is None:
        basis = "nothing tells the power of this device; pretrain.monitor.energy.device_watts can"
    else:
        power = "the GPU's maximum power" if config.device_watts is None else f"{config.device_watts:g} W"
        basis = f"{power} for this time, PUE {config.pue:g}, {config.kg_co2e_per_kwh:g} kg CO2e per kWh"
    return PassCost(device_seconds, cost["energy_kwh"], cost["co2e_kg"], basis)
