// The tasks of mingpt/tasks.py on one row. A task that is not here, such as a user's own, is known by its stored rows only.

const counts = (row) => row.map((x) => row.filter((other) => other === x).length);
const always = () => true;
const divides = (row) => row[0] > 0;

const TASKS = {
  SortAscending: [always, (row) => row.toSorted((a, b) => a - b)],
  SortDescending: [always, (row) => row.toSorted((a, b) => b - a)],
  Add1: [always, (row) => row.map((x) => x + 1)],
  InverseBinary: [(row) => row.every((x) => x === 0 || x === 1), (row) => row.map((x) => 1 - x)],
  DoubleHistogram: [always, counts],
  LessThan: [always, (row) => row.map((x) => (x < row[0] ? x : 0))],
  MoreThanEqual: [always, (row) => row.map((x) => (x >= row[0] ? x : 0))],
  FilterAtLeastNTimes: [always, (row) => counts(row).map((count, i) => (count >= row[0] ? row[i] : 0))],
  Modulo: [divides, (row) => row.map((x) => x % row[0])],
  Divisible: [divides, (row) => row.map((x) => (x % row[0] === 0 ? x : 0))],
  NotDivisible: [divides, (row) => row.map((x) => (x % row[0] !== 0 ? x : 0))],
};

/** What a task such as "SortAscending+Add1" makes of a row; null where it is not defined, or the task is not known. */
export function solve(name, row) {
  for (const part of name.split("+")) {
    const [isDefined, apply] = TASKS[part] ?? [() => false];
    if (!isDefined(row)) return null;
    row = apply(row);
  }
  return row;
}

/** Whether the page can compute the task. */
export const isKnown = (name) => name.split("+").every((part) => part in TASKS);

export const isSame = (a, b) => a !== null && b !== null && a.length === b.length && a.every((x, i) => x === b[i]);
