"""The tables of the FlexGen paper: what is printed, beside what is simulated or was run."""
