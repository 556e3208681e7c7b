// Numbers and times for people. Everything takes null and says "-" or nothing.
const NONE = "\u2013";

export function bytes(nbytes) {
  if (!Number.isFinite(nbytes)) return NONE;
  let amount = nbytes;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (Math.abs(amount) < 999.95) return unit === "B" ? `${Math.round(amount)} B` : `${amount.toFixed(1)} ${unit}`;
    amount /= 1000;
  }
  return `${amount.toFixed(1)} TB`;
}

export function percent(fraction) {
  if (!Number.isFinite(fraction)) return NONE;
  const amount = 100 * fraction;
  const digits = amount === 0 || amount >= 99.95 ? 0 : amount >= 10 ? 1 : amount >= 0.1 ? 2 : 3;
  return `${amount.toFixed(digits)}\u2009%`;
}

export function count(number) {
  return Number.isFinite(number) ? number.toLocaleString("en-US") : NONE;
}

export function short(number) {
  if (!Number.isFinite(number)) return NONE;
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(number) >= size) return `${(number / size).toPrecision(3)}\u2009${unit}`;
  }
  return String(number);
}

/** Any metric: enough digits to tell neighbours apart. */
export function number(value) {
  if (!Number.isFinite(value)) return NONE;
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return count(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : value.toPrecision(4);
}

export function score(value) {
  return Number.isFinite(value) ? value.toFixed(3) : NONE;
}

export function seconds(value) {
  if (!Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  if (size === 0) return "0\u2009s";
  if (size < 1e-3) return `${(value * 1e6).toFixed(0)}\u2009\u00b5s`;
  if (size < 1) return `${(value * 1e3).toFixed(size < 0.1 ? 1 : 0)}\u2009ms`;
  if (size < 100) return `${value.toFixed(1)}\u2009s`;
  if (size < 7200) return `${Math.round(value / 60)}\u2009min`;
  return `${(value / 3600).toFixed(1)}\u2009h`;
}

/** "3 h ago". */
export function ago(stamp) {
  const at = Date.parse(stamp ?? "");
  if (Number.isNaN(at)) return "at an unknown time";
  const passed = (Date.now() - at) / 1000;
  if (passed < -60) return "in the future, by its writer's clock";
  if (passed < 60) return "just now";
  for (const [size, unit] of [[86400 * 365, "year"], [86400 * 30, "month"], [86400, "day"], [3600, "hour"], [60, "minute"]]) {
    if (passed >= size) {
      const amount = Math.floor(passed / size);
      return `${amount} ${unit}${amount > 1 ? "s" : ""} ago`;
    }
  }
  return "just now";
}

/** Local date and time, for titles and rows. */
export function moment(stamp) {
  const at = new Date(stamp ?? "");
  if (Number.isNaN(at.getTime())) return NONE;
  return at.toLocaleString("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

export function versions(first, last) {
  return first === last ? `v${first}` : `v${first} to v${last}`;
}
