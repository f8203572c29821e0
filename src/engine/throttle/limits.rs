//! What an operator limits: six rates, each with a burst, in libvirt's words (`virsh blkdeviotune`) and in QEMU's
//! (`block_set_io_throttle`). The rules are those of QEMU's `throttle_is_valid`.

use std::fmt;

/// The largest value (QEMU's THROTTLE_VALUE_MAX).
pub const MAX_VALUE: u64 = 1_000_000_000_000_000;

/// How many rates can be limited.
pub(super) const RATES: usize = 6;

/// The rates: libvirt's word, and QEMU's. Bytes come first, then operations; each in total, of reads and of writes.
const NAMES: [(&str, &str); RATES] = [
    ("total-bytes-sec", "bps"),
    ("read-bytes-sec", "bps_rd"),
    ("write-bytes-sec", "bps_wr"),
    ("total-iops-sec", "iops"),
    ("read-iops-sec", "iops_rd"),
    ("write-iops-sec", "iops_wr"),
];

/// libvirt's word and QEMU's for the size of one operation.
const SIZE_NAME: (&str, &str) = ("size-iops-sec", "iops_size");

/// The limit of one rate. Zeroes: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Rate {
    /// Bytes or operations a second.
    pub(super) average: u64,
    /// The same during a burst; 0: a burst is a tenth of a second's worth.
    pub(super) max: u64,
    /// How many seconds a burst at `max` may last; 0: not given, which means one.
    pub(super) max_length: u64,
}

/// The limits of one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Limits {
    pub(super) rates: [Rate; RATES],
    /// A request of more bytes counts as several operations, in proportion; 0: each request is one operation.
    pub(super) op_size: u64,
}

/// The values in libvirt's words, for people: `total-iops-sec=500, size-iops-sec=4096`, or `no limits`.
impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let values: Vec<String> =
            self.values(Words::Libvirt).iter().map(|(name, value)| format!("{name}={value}")).collect();
        match values.is_empty() {
            true => f.write_str("no limits"),
            false => f.write_str(&values.join(", ")),
        }
    }
}

/// Whose words a name is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Words {
    /// `total-iops-sec-max`.
    Libvirt,
    /// `iops_max`.
    Qemu,
}

impl Words {
    fn of(self, (libvirt, qemu): (&'static str, &'static str)) -> &'static str {
        match self {
            Words::Libvirt => libvirt,
            Words::Qemu => qemu,
        }
    }

    fn suffixes(self) -> [&'static str; 3] {
        match self {
            Words::Libvirt => ["", "-max", "-max-length"],
            Words::Qemu => ["", "_max", "_max_length"],
        }
    }
}

impl Rate {
    fn fields(&mut self) -> [&mut u64; 3] {
        [&mut self.average, &mut self.max, &mut self.max_length]
    }

    /// Seconds of a burst. QEMU's default is one.
    pub(super) fn burst_seconds(&self) -> u64 {
        self.max_length.max(1)
    }
}

impl Limits {
    /// All names, in the order of [`Limits::values`].
    pub fn names(words: Words) -> Vec<String> {
        let rates = NAMES.iter().flat_map(|name| words.suffixes().map(|suffix| format!("{}{suffix}", words.of(*name))));
        rates.chain([words.of(SIZE_NAME).to_owned()]).collect()
    }

    /// The values that are not zero, with their names.
    pub fn values(mut self, words: Words) -> Vec<(String, u64)> {
        let op_size = self.op_size;
        let values = self.rates.iter_mut().flat_map(|rate| rate.fields().map(|field| *field)).chain([op_size]);
        Limits::names(words).into_iter().zip(values).filter(|(_, value)| *value > 0).collect()
    }

    /// Sets one value; 0: no limit. `false`: there is no such name.
    pub fn set(&mut self, words: Words, name: &str, value: u64) -> bool {
        let op_size = &mut self.op_size;
        let fields = self.rates.iter_mut().flat_map(Rate::fields).chain([op_size]);
        match Limits::names(words).iter().zip(fields).find(|(known, _)| *known == name) {
            Some((_, field)) => {
                *field = value;
                true
            }
            None => false,
        }
    }

    /// Whether anything is limited.
    pub fn is_limited(&self) -> bool {
        self.rates.iter().any(|rate| rate.average > 0)
    }

    /// Whether reads or writes have a limit of their own, so that one kind may have to wait while the other need not.
    pub fn is_split(&self) -> bool {
        self.rates.iter().enumerate().any(|(index, rate)| index % 3 != 0 && rate.average > 0)
    }

    /// Changes the values that one command gives, in libvirt's words, as an operator means them: a limit of the total
    /// replaces those of reads and writes, and the other way round. 0 lifts the limit, with its burst, and the size of an
    /// operation with the last limit of operations. The error uses libvirt's words.
    pub fn change(&mut self, given: &[(String, u64)]) -> Result<(), String> {
        let mut together = Limits::default();
        for (name, value) in given {
            if !together.set(Words::Libvirt, name, *value) {
                return Err(format!("there is no limit '{name}'"));
            }
        }
        together.check_totals(Words::Libvirt)?;
        let mut lifts_operations = false;
        for (name, value) in given {
            self.set(Words::Libvirt, name, *value);
            let Some(index) = NAMES.iter().position(|(known, _)| known == name) else { continue };
            let total = index - index % 3;
            if *value == 0 {
                self.rates[index] = Rate::default();
                lifts_operations |= index >= RATES / 2;
            } else if index == total {
                self.rates[total + 1..total + 3].fill(Rate::default());
            } else {
                self.rates[total] = Rate::default();
            }
        }
        if lifts_operations && together.op_size == 0 && self.rates[RATES / 2..].iter().all(|rate| rate.average == 0) {
            self.op_size = 0;
        }
        self.check(Words::Libvirt)
    }

    /// Checks the rules that concern several values. The error uses the names in `words`.
    pub fn check(&self, words: Words) -> Result<(), String> {
        for (index, rate) in self.rates.iter().enumerate() {
            let [name, max, length] = words.suffixes().map(|suffix| format!("{}{suffix}", words.of(NAMES[index])));
            self.check_rate(rate, &name, &max, &length)?;
        }
        self.check_totals(words)?;
        if self.op_size > MAX_VALUE {
            return Err(format!("{} is larger than {MAX_VALUE}", words.of(SIZE_NAME)));
        }
        if self.op_size > 0 && self.rates[3..].iter().all(|rate| rate.average == 0) {
            return Err(format!("{} needs a limit of operations, such as {}", words.of(SIZE_NAME), words.of(NAMES[3])));
        }
        Ok(())
    }

    fn check_totals(&self, words: Words) -> Result<(), String> {
        for (index, rate) in self.rates.iter().enumerate() {
            let total = index - index % 3;
            if index != total && rate.average > 0 && self.rates[total].average > 0 {
                let (name, total) = (words.of(NAMES[index]), words.of(NAMES[total]));
                return Err(format!("{total} and {name} exclude each other: give the total, or reads and writes"));
            }
        }
        Ok(())
    }

    fn check_rate(&self, rate: &Rate, name: &str, max: &str, length: &str) -> Result<(), String> {
        if rate.average > MAX_VALUE || rate.max > MAX_VALUE {
            return Err(format!("{name} and {max} may be at most {MAX_VALUE}"));
        }
        if rate.max == 0 && rate.max_length > 0 {
            return Err(format!("{length} needs {max}, the rate of a burst"));
        }
        if rate.max > 0 && rate.average == 0 {
            return Err(format!("{max} needs {name}, the rate after the burst"));
        }
        if rate.max > 0 && rate.max < rate.average {
            return Err(format!(
                "{max} is lower than {name}: a burst is faster than that, so give more or leave {max} out"
            ));
        }
        if rate.max > 0 && rate.max_length > MAX_VALUE / rate.max {
            return Err(format!("{length} is too large: {max} times {length} may be at most {MAX_VALUE}"));
        }
        Ok(())
    }
}
