import type { Dashboard } from "@grafana/schema";

/** T as JSON writes it: what is an enum there is one of its strings. */
type Plain<T> = T extends string ? `${T}` : { [K in keyof T]: Plain<T[K]> };

export type Board = Plain<Dashboard>;
