"""`adalora compare`: a study file → its runs → the learning rates chosen, tables and plots."""
