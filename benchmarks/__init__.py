"""How fast deltatune is, against what else there is: ops, training steps, and the tables made of the records.

``python -m benchmarks.ops``, ``benchmarks.train``, ``benchmarks.compare`` measure and write records;
``benchmarks.tables`` makes the tables of the documentation; ``benchmarks.targets`` says what is met. Outside the
package, over its public names alone, so that any version of it can be timed by ``PYTHONPATH``.
"""
