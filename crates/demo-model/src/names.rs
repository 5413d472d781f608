//! Invented names of the world's nouns. All start with a consonant, so that "a" is always the article.

/// Names of the creatures.
pub(crate) const CREATURES: &str = "\
bambo belfin bipli blicket bogrel borvin bralta brimbo bundar cabrin cheldo clomper corvel dabbin delvor \
dorfen drimsy drombel dulpin fandle farbo felmer fimble flarn flimmer flostin forlin frabbit frondel gadrin \
galmer garvel gazzer glarp glimmon gloffin gopple gorvin grelk grimbo groff gumbar habbol haldin hembo hirple \
hobrin hulper jabbel jandor jembo jolfin jumber kabble kandor kelpin kimbo klorp koddle korvin larmin lelpo \
lodrin lorpin mabble mandor mimble modrin morvel mumper nabbel nandle nelbo nimper nodrin";

/// Names of the plants.
pub(crate) const PLANTS: &str = "\
pabrin palko pelmon pimbel plindo podrin porvel prandel pumblo rabbol relmo rimbel rodrin rolpen rumbo sabrin \
selmon simbel slarn snorvin sodrel spimble stolder tabrin talmo telber timbo todrin tolpen trandle tulver vabble \
valmon velbo vimbel vodrin vorpel yabbin yelmo zabrin zelmo zimper zodrel zolpin \
balmo belder bimbel borgel brindo dalmer delmo dimbel dorvel falmer felbo galdo gimper halmo helber himbel jalmer \
jelbo kalmon kelmo kimper lalder lembo malder melko mimper nalmo nelder nimbel ralmo rembel sembo talder tembo \
velder wobbin wemble wimper zalder zembo";
