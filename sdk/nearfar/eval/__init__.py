"""What a model can do, in figures with their baselines and intervals.  Any file that `LLM` opens; numpy only.

    tasks (intents calls home) -> predict -> predictions -> metrics, intervals -> report
    exits -> calibrate: what leaves early, and which thresholds may be trusted

`nearfar eval` and `nearfar calibrate` (cli.py) are the two walks through here.
"""
