// Samples as columns for charts.

export const seconds = (line) => line.samples.map((sample) => sample.at_ms / 1000);
export const column = (line, key) => line.samples.map((sample) => sample[key]);
/** Where a value changed, in seconds. */
export const changes = (line, key) =>
  line.samples.filter((sample, i) => i && sample[key] !== line.samples[i - 1][key]).map((sample) => sample.at_ms / 1000);
export const colours = ["--s1", "--s2", "--s3", "--s4", "--s5", "--s6", "--s7", "--s8"];
