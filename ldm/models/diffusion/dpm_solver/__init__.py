"""DPM-Solver++, under the import path of the original, whose package this was."""

from ldm.models.diffusion.dpm_solver.sampler import DPMSolverSampler as DPMSolverSampler
