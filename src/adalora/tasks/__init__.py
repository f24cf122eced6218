"""Data and demos: what the commands train on when the user brings nothing."""
