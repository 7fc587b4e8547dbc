"""The method: masks, topology updates, densities, schedules, tickets and their superposition."""
