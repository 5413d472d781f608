//! Which adapters outputs are made with.

use trainable_tokens_core::{Overlap, TokenAdapter, TokenSet};

use super::team::{Member, active, disjoint, idle, in_effect, names, over, overlapping};
use crate::cases::head::product;
use crate::failure::{close, equal, same};
use crate::world::{for_all, logits, lookup, noise, odd_values, select, whole};
use crate::{Harness, Layer, Outcome};

/// A new layer has one adapter, `default`, and it is active; a frozen one has none, and adding does not activate.
pub fn a_new_layers_only_adapter_is_called_default<H: Harness>() -> Outcome {
    for_all(|world| {
        for layer in [world.fresh::<H>()?, world.trained::<H>()?] {
            let all: Vec<&str> = layer.adapters().map(TokenAdapter::name).collect();
            equal("the adapters", &all, &vec!["default"])?;
            let active: Vec<&str> = layer.active_names().collect();
            equal("the active adapters", &active, &vec!["default"])?;
            same("its rows", &layer.adapter("default")?.rows()?, &layer.rows()?)?;
        }
        let mut frozen = Layer::<H>::frozen(H::source(&world.table::<H>())?)?;
        let want = select(&world.table::<H>(), &world.ids)?;
        same("rows without adapters", &lookup::<H>(&frozen, &world.ids)?, &want)?;
        let tokens = world.token_set()?;
        frozen.add_adapter_with_rows("added", tokens, &world.rows::<H>())?;
        equal("active adapters", &frozen.active_names().count(), &0)?;
        same(
            "rows with an added one",
            &lookup::<H>(&frozen, &world.ids)?,
            &want,
        )
    })
}

/// The lookup with several active adapters of disjoint tokens has the bits of the table with all their rows in it, in
/// whatever order they are active, odd values among them.
pub fn adapters_of_disjoint_tokens_act_together<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = odd_values(world.seed, H::DTYPE, world.v, world.d);
        let mut members = disjoint(world, H::DTYPE);
        for (member, salt) in members.iter_mut().zip(1..) {
            member.rows = odd_values(world.seed + salt, H::DTYPE, member.tokens.len(), world.d);
        }
        let mut layer = over::<H>(&table, &members)?;
        let want = in_effect(&table, &members, &Overlap::Refuse)?;
        let mut order = names(&members);
        for _ in 0..3 {
            order.rotate_left(1);
            layer.activate(&order)?;
            let active: Vec<&str> = layer.active_names().collect();
            equal("the active adapters", &active, &order)?;
            let got = lookup::<H>(&layer, &world.ids)?;
            same("rows", &got, &select(&want, &world.ids)?)?;
        }
        same("the table", &whole::<H>(&layer)?, &table)
    })
}

/// Adapters that are not active leave no trace in lookup and head, and are as they were when they are active again.
pub fn inactive_adapters_leave_no_trace<H: Harness>() -> Outcome {
    for_all(|world| {
        let members = overlapping(world, H::DTYPE.default_row_dtype());
        let hidden = world.hidden::<H>();
        let mut layer = idle::<H>(world, &members)?;
        let mut chosen: Vec<&[Member]> = vec![&[]];
        chosen.extend(members.chunks(1));
        chosen.extend(members.chunks(1));
        chosen.push(&[]);
        for chosen in chosen {
            layer.activate(&names(chosen))?;
            let alone = active::<H>(world, chosen, &Overlap::Refuse)?;
            let what = format!("with {:?} active", names(chosen));
            let rows = lookup::<H>(&layer, &world.ids)?;
            same(&format!("rows {what}"), &rows, &lookup::<H>(&alone, &world.ids)?)?;
            let dense = in_effect(&world.table::<H>(), chosen, &Overlap::Refuse)?;
            same(&format!("rows {what}"), &rows, &select(&dense, &world.ids)?)?;
            let got = logits::<H>(&layer, &hidden)?;
            same(&format!("logits {what}"), &got, &logits::<H>(&alone, &hidden)?)?;
        }
        for member in &members {
            same("its rows", &layer.adapter(member.name)?.rows()?, &member.rows)?;
        }
        Ok(())
    })
}

/// Several new adapters together are a no-op: lookup and head have the frozen table's bits, also where adapters overlap.
pub fn several_untrained_adapters_are_a_no_op<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = world.table::<H>();
        let hidden = world.hidden::<H>();
        let frozen = Layer::<H>::frozen(H::source(&table)?)?;
        let want = [lookup::<H>(&frozen, &world.ids)?, logits::<H>(&frozen, &hidden)?];
        let dtype = H::DTYPE.default_row_dtype();
        for (members, overlap) in [
            (disjoint(world, dtype), Overlap::Refuse),
            (overlapping(world, dtype), Overlap::LastWins),
        ] {
            let mut layer = Layer::<H>::frozen(H::source(&table)?)?;
            for member in &members {
                let tokens = TokenSet::new(member.tokens.iter().copied(), world.v)?;
                layer.add_adapter(member.name, tokens)?;
            }
            layer.activate_overlapping(&names(&members), overlap)?;
            same("rows", &lookup::<H>(&layer, &world.ids)?, &want[0])?;
            same("logits", &logits::<H>(&layer, &hidden)?, &want[1])?;
        }
        Ok(())
    })
}

/// Rows that one of several active adapters gets are seen by the next lookup and head, and the others keep theirs.
pub fn rewritten_rows_are_seen_by_the_next_lookup_and_head<H: Harness>() -> Outcome {
    for_all(|world| {
        let mut members = disjoint(world, H::DTYPE.default_row_dtype());
        let (table, hidden) = (world.table::<H>(), world.hidden::<H>());
        let mut layer = active::<H>(world, &members, &Overlap::Refuse)?;
        let plan = layer.plan(&world.ids)?;
        for at in 0..3 {
            layer.lookup_planned(&plan)?;
            let rows = &mut members[at].rows;
            *rows = noise(world.seed + 40, rows.dtype(), rows.num_rows(), world.d);
            layer.adapter_mut(members[at].name)?.set_rows(&members[at].rows)?;
            let dense = in_effect(&table, &members, &Overlap::Refuse)?;
            let got = H::read(&layer.lookup_planned(&plan)?)?;
            same("rows", &got, &select(&dense, &world.ids)?)?;
            let want = product(&hidden, &dense);
            close("logits", &logits::<H>(&layer, &hidden)?, &want, H::DTYPE)?;
            for member in &members {
                same("trained rows", &layer.adapter(member.name)?.rows()?, &member.rows)?;
            }
        }
        Ok(())
    })
}

/// While disabled, lookup and head are the frozen table's, bit for bit, whatever is activated; enabled again, the active
/// adapters are in effect.
pub fn disabling_shows_the_table_until_enabled<H: Harness>() -> Outcome {
    for_all(|world| {
        let members = overlapping(world, H::DTYPE.default_row_dtype());
        let (table, hidden) = (world.table::<H>(), world.hidden::<H>());
        let frozen = Layer::<H>::frozen(H::source(&table)?)?;
        let mut layer = active::<H>(world, &members, &Overlap::LastWins)?;
        layer.disable()?;
        for chosen in [&members[..], &members[..1], &members[..0]] {
            equal("is_enabled", &layer.is_enabled(), &false)?;
            let got = lookup::<H>(&layer, &world.ids)?;
            same("rows while disabled", &got, &select(&table, &world.ids)?)?;
            let want = logits::<H>(&frozen, &hidden)?;
            same("logits while disabled", &logits::<H>(&layer, &hidden)?, &want)?;
            layer.activate_overlapping(&names(chosen), Overlap::LastWins)?;
        }
        layer.activate_overlapping(&names(&members[1..]), Overlap::LastWins)?;
        layer.enable();
        equal("is_enabled", &layer.is_enabled(), &true)?;
        let dense = in_effect(&table, &members[1..], &Overlap::LastWins)?;
        let got = lookup::<H>(&layer, &world.ids)?;
        same("rows", &got, &select(&dense, &world.ids)?)
    })
}
