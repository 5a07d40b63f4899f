"""Where the time of a PPO step goes: a trace is collected, analysed and drawn.

trace.json.gz and meta.json are all that is kept of a profiled run; the table and the page are made
of them by pure functions, on any machine.
"""
