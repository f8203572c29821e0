//! Changes the description of a domain's next start (`virsh define`) so that no other change of it is lost: `define`
//! replaces the whole description, also what another program changed since it was read.

use super::domain::Domain;
use super::domain_lock::DomainLock;
use super::hook;
use super::places::Places;
use super::virsh;

/// How often to begin again when the description has changed meanwhile.
const MAX_ATTEMPTS: u32 = 3;

/// Reads the description of the domain's next start, lets `change` make another one of it, and lets libvirt define that.
/// Holds the domain's lock meanwhile. Returns what `change` gave besides.
pub fn redefine<T>(
    places: &Places,
    name: &str,
    change: impl Fn(&str) -> Result<(String, T), String>,
) -> Result<T, String> {
    let domain = Domain::parse(&virsh::describe(name, true)?).map_err(|error| error.to_string())?;
    hook::make_directories(places)?;
    let lock = DomainLock::take(&places.changes(&domain), &domain.name)?;
    let define = |xml: &str| lock.shared_with_children(|| virsh::define(xml));
    define_unless_changed(|| virsh::describe_whole(name), define, change)
        .map_err(|error| format!("domain {}: {error}", domain.name))
}

/// `virsh edit` and other programs do not know our lock: the description is read again right before it is replaced.
fn define_unless_changed<T>(
    describe: impl Fn() -> Result<String, String>,
    define: impl Fn(&str) -> Result<(), String>,
    change: impl Fn(&str) -> Result<(String, T), String>,
) -> Result<T, String> {
    for _ in 0..MAX_ATTEMPTS {
        let before = describe()?;
        let (xml, more) = change(&before)?;
        if describe()? == before {
            return define(&xml).map(|()| more);
        }
    }
    Err(format!("its description changed {MAX_ATTEMPTS} times while it was being changed here: run this command again"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    #[test]
    fn a_change_that_another_program_makes_meanwhile_is_not_lost() {
        let stored = RefCell::new("a".to_owned());
        let others = Cell::new(1);
        let describe = || Ok(stored.borrow().clone());
        let define = |xml: &str| {
            *stored.borrow_mut() = xml.to_owned();
            Ok(())
        };
        let change = |xml: &str| {
            if others.get() > 0 {
                others.set(others.get() - 1);
                stored.borrow_mut().push('b');
            }
            Ok((format!("{xml}c"), xml.len()))
        };
        assert_eq!(define_unless_changed(describe, define, change), Ok(2));
        assert_eq!(*stored.borrow(), "abc");
        // One that never ends is given up, and nothing is defined.
        others.set(100);
        let error = define_unless_changed(describe, define, change).unwrap_err();
        assert!(error.contains("run this command again"), "{error}");
        assert_eq!(*stored.borrow(), "abcbbb");
        let refused = define_unless_changed(describe, define, |_| Err::<(String, ()), _>("no".into()));
        assert_eq!((refused, stored.borrow().as_str()), (Err("no".into()), "abcbbb"));
    }
}
