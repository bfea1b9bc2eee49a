"""Strategies side by side over seeds, and what came of them (extra `compare`).

`plan` says what is run and runs it on `simulation`; `results` reads runs back, `report`
shows them. May import everything.
"""
