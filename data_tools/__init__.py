"""Programs that prepare datasets: `./run.sh data NAME`, or `python -m data_tools NAME`.

vit_static imports none of them.
"""
