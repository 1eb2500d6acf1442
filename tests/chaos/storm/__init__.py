"""The storm: a pool under seeded faults, and a checker that has nothing in common with the code it checks."""
